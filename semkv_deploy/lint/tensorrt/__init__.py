"""Rules of the TensorRT lint, by subject; `lint_tensorrt` runs them all."""
