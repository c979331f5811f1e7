"""Masked autoencoders on timm Vision Transformers: the method, without Ray or MLflow."""
