"""Trains what SONIC deploys: embeddings of Nexus tokens and LoRA weights for their rows, on a frozen model."""
