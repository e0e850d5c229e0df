"""The paper's baselines: LLaVA with several vision encoders."""
