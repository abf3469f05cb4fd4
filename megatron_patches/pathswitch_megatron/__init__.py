"""The place of the hooks for Megatron-LM and Megatron-DeepSpeed; this release installs none and patches nothing."""
