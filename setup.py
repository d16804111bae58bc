"""What pyproject.toml cannot say: a wheel carries the native operators for ONNX Runtime where they can be built.

SEMKV_NATIVE: "auto" (default) builds them and goes on without where that fails, "on" fails then, "off" leaves them out,
and the path of a library that was built before takes that. With them a wheel is for this platform, without for any.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel

ROOT = Path(__file__).resolve().parent
LIBRARY = ROOT / "semkv_deploy" / "native" / "libsemkv_onnxruntime.so"


class NativeWheel(bdist_wheel):
    """Builds the library before the package's files are collected."""

    # Not in finalize_options: editable installs call that as well, and have scripts/build_native.sh.
    def run(self) -> None:
        if put_native_library(os.environ.get("SEMKV_NATIVE", "auto")):
            self.root_is_pure = False
            # Else files are taken for another place than the wheel's root.
            self.distribution.has_ext_modules = lambda: True
            self.distribution.package_data["semkv_deploy"].append(f"native/{LIBRARY.name}")
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        # The library knows nothing of Python.
        _, _, platform = super().get_tag()
        return "py3", "none", platform


def put_native_library(wanted: str) -> bool:
    """Puts the library into the package; returns whether it is there."""
    if wanted == "off":
        return False
    if wanted not in ("auto", "on"):
        if not Path(wanted).is_file():
            sys.exit(f"SEMKV_NATIVE: no such library\n  expected: auto, on, off, or a library's path\n  got: {wanted}")
        LIBRARY.parent.mkdir(exist_ok=True)
        if Path(wanted).resolve() != LIBRARY:
            shutil.copyfile(wanted, LIBRARY)
        return True
    script = ROOT / "scripts" / "build_native.sh"
    done = subprocess.run(["bash", script], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        said = done.stdout.decode(errors="replace").strip()
        if wanted == "on":
            sys.exit(f"SEMKV_NATIVE=on, and the native operators cannot be built\n{said}")
        print(f"The wheel has no native operators, and is for any platform. What building them said:\n{said}")
    return done.returncode == 0


setup(cmdclass={"bdist_wheel": NativeWheel})
