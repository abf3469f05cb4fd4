"""The digest: the same on every backend, the same however a state is cut, and another after any damage."""

from __future__ import annotations

import pytest
import torch
from arena import isas
from torch import Tensor

from pathswitch.kernels.cpu import CpuKernels
from pathswitch.kernels.digest import StateDigest, merged
from pathswitch.kernels.layouts import Kernels
from pathswitch.kernels.reference import ReferenceKernels, _column_keys


def digest(kernels: Kernels, tensor: Tensor, first_index: int = 0) -> list[int]:
    out = torch.zeros(2, dtype=torch.int64)
    kernels.digest(tensor, first_index, out)
    return out.tolist()


def total(*digests: list[int]) -> list[int]:
    return torch.tensor(digests).sum(0).tolist()  # int64 wraps


def definition(tensor: Tensor, first_index: int) -> list[int]:
    """The sum of bits * key(index) modulo 2^64, one element after the other, in Python's integers."""

    def mix(z: int) -> int:
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        return z ^ z >> 31

    lanes = [0, 0]
    for index, bits in enumerate(tensor.view(torch.int32).tolist(), first_index):
        block, column = divmod(index, 1024)
        for lane in (0, 1):
            key = mix((2 * column + lane + 1) * 0x9E3779B97F4A7C15 % 2**64) >> 32
            key *= mix((2 * block + lane + 1) * 0xD1342543DE82EF95 % 2**64) | 1
            lanes[lane] += bits % 2**32 * key
    return [(lane + 2**63) % 2**64 - 2**63 for lane in lanes]


@pytest.mark.parametrize("isa", isas())
def test_backends_follow_the_definition(isa: str) -> None:
    tensor = torch.randn(3001)
    for numel, first in [(0, 5), (1, 0), (1, 1023), (1023, 1), (1025, 0), (3001, 0), (3001, 1023), (3001, 2**40 + 7)]:
        expected = definition(tensor[:numel], first)
        assert digest(CpuKernels(isa), tensor[:numel], first) == expected
        assert digest(ReferenceKernels(), tensor[:numel], first) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cuts_do_not_matter(dtype: torch.dtype) -> None:
    tensor = torch.randn(1_100_000).to(dtype)
    whole = digest(CpuKernels(), tensor)
    assert whole == digest(ReferenceKernels(), tensor)
    for cut in (1, 1023, 1024, 16385, 1_048_576, 1_099_999):
        parts = [digest(CpuKernels(), tensor[:cut]), digest(CpuKernels(), tensor[cut:], cut)]
        assert total(*parts) == whole
        assert total(digest(ReferenceKernels(), tensor[cut:], cut), parts[0]) == whole


def test_every_single_flipped_bit_is_found() -> None:
    tensor = torch.randn(64)
    whole = digest(CpuKernels(), tensor)
    for position in range(64):
        for bit in range(32):
            damaged = tensor.clone()
            damaged.view(torch.int32)[position] ^= (1 << bit) - (1 << 32 if bit == 31 else 0)
            found = digest(CpuKernels(), damaged)
            assert found[0] != whole[0] and found[1] != whole[1]


def test_no_key_is_zero_and_none_occurs_twice() -> None:
    columns = _column_keys()
    for lane in (0, 1):
        assert len(set(columns[lane].tolist()) - {0}) == columns.shape[1]


def test_swaps_shifts_and_the_sign_of_zero_are_found() -> None:
    tensor = torch.randn(5000)
    whole = digest(CpuKernels(), tensor)
    swapped, blocks = tensor.clone(), tensor.clone()
    swapped[[5, 6]] = swapped[[6, 5]]
    blocks[:1024], blocks[1024:2048] = tensor[1024:2048], tensor[:1024]
    assert whole not in (digest(CpuKernels(), swapped), digest(CpuKernels(), blocks), digest(CpuKernels(), tensor, 1))
    zeros = torch.zeros(10)
    negative = zeros.clone()
    negative[3] = -0.0
    assert digest(CpuKernels(), zeros) != digest(CpuKernels(), negative)


def test_states_add_up_and_names_count() -> None:
    tensors = {"a.weight": torch.randn(3000), "b.weight": torch.randn(3000)}

    def state(pieces: list[tuple[str, int, int]], rename: dict[str, str] | None = None) -> StateDigest:
        result = StateDigest()
        for name, start, end in pieces:
            result.add("weights", (rename or {}).get(name, name), tensors[name][start:end], start)
        return result

    whole = state([("a.weight", 0, 3000), ("b.weight", 0, 3000)]).to_dict()
    left, right = state([("a.weight", 0, 1111)]), state([("b.weight", 0, 3000), ("a.weight", 1111, 3000)])
    assert merged([right.to_dict(), left.to_dict()]) == whole
    assert whole["weights"]["elements"] == 6000
    exchanged = state([("a.weight", 0, 3000), ("b.weight", 0, 3000)], {"a.weight": "b.weight", "b.weight": "a.weight"})
    assert exchanged.to_dict() != whole
    zeros = StateDigest()
    zeros.add("weights", "a", torch.zeros(5), 0)
    more = StateDigest()
    more.add("weights", "a", torch.zeros(6), 0)
    assert zeros.to_dict() != more.to_dict()
