"""A stand-in for Megatron-LM's training package: its names and its order of things, around one linear layer.

The hooks act on names; this is the smallest loop that calls them as Megatron-LM does, so that every hook runs in every
test run. What a real Megatron-LM does with them is test_pretrain_gpt.py's.
"""
