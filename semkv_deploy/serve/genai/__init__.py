"""A bundle's full-cache decoder for onnxruntime-genai."""
