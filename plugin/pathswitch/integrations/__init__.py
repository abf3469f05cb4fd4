"""The only place that touches torch's and deepspeed's registries and classes."""
