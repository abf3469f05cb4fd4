"""Hooks for Megatron-LM and Megatron-DeepSpeed: nothing in this package patches anything yet."""
