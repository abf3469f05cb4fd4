"""The GPUs that the CUDA driver shows, by ctypes: torch takes seconds to import, and may be one without CUDA."""

from __future__ import annotations

import ctypes
from ctypes import byref, c_char_p, c_int
from dataclasses import dataclass

_COMPUTE_CAPABILITY = (75, 76)  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
_DRIVER = "libcuda.so.1"


@dataclass(frozen=True)
class Gpu:
    """A GPU: its name, and its compute capability without the point, as "90"."""

    name: str
    architecture: str


def find_gpus() -> tuple[str, list[Gpu]]:
    """Return what is to be said of the CUDA driver, and the GPUs that it shows."""
    try:
        driver = ctypes.CDLL(_DRIVER)
    except OSError:
        return f"none ({_DRIVER} is not there)", []
    version, count = c_int(), c_int()
    if code := driver.cuInit(0):
        return f"no GPU ({_said(driver, code)})", []
    if (code := driver.cuDriverGetVersion(byref(version))) or (code := driver.cuDeviceGetCount(byref(count))):
        return f"fails ({_said(driver, code)})", []
    text = f"for CUDA {version.value // 1000}.{version.value % 1000 // 10}"
    return text, [_gpu(driver, number) for number in range(count.value)]


def _gpu(driver: ctypes.CDLL, number: int) -> Gpu:
    device, name = c_int(), ctypes.create_string_buffer(256)
    driver.cuDeviceGet(byref(device), number)
    driver.cuDeviceGetName(name, len(name), device)
    values = [c_int(), c_int()]
    for value, attribute in zip(values, _COMPUTE_CAPABILITY, strict=True):
        driver.cuDeviceGetAttribute(byref(value), attribute, device)
    return Gpu(name.value.decode(errors="replace"), "".join(str(value.value) for value in values))


def _said(driver: ctypes.CDLL, code: int) -> str:
    text = c_char_p()
    driver.cuGetErrorString(code, byref(text))
    return f"error {code}" + (f": {text.value.decode()}" if text.value else "")
