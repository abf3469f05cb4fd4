"""From a plan to running jobs: one deepspeed launch per path."""
