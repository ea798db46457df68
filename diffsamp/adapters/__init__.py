"""Faces of the core in other libraries: diffusers pipelines, schedulers and guiders, k-diffusion."""
