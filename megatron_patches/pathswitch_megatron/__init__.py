"""Learning-rate path switching for Megatron, adopted by environment variables: LR, forks, checkpoints, refusals.

PATHSWITCH_PLAN names the plan file and PATHSWITCH_PATH the path; the launch script stays as it is. Where PyTorch's
loading of entry points is switched off, ``torchrun ... -m pathswitch_megatron pretrain_gpt.py ...`` does the same.
"""

PLAN_VARIABLE = "PATHSWITCH_PLAN"
