"""The only place that touches torch's and deepspeed's registries and classes.

``import pathswitch.integrations`` in a training script registers PathSwitchLR where PyTorch's loading of entry points
is switched off.
"""

from pathswitch.integrations.torch_autoload import register

register()
