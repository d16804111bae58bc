"""`semkv_deploy.compiler.calibrate` under the name that scripts written for 0.1 import."""

from semkv_deploy.compiler.calibrate import calibration_text, mean_kl

__all__ = ["calibration_text", "mean_kl"]
