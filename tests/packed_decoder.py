"""A decoder of packed tables, from docs/packed-format.md alone: plain loops over lists of numbers."""

from __future__ import annotations

from typing import Any


def decode_row(i: int, tensors: dict[str, Any], V: int, H: int) -> list[float]:
    directory, tiers = tensors["directory"], tensors["tiers"]
    block, lane = divmod(i, 32)

    def tier_of(j: int) -> int:
        return directory[block][1 + j // 8] >> 4 * (j % 8) & 15

    at = directory[block][0] + sum(sum(tiers[tier_of(j)][1:]) for j in range(lane))
    transform, *all_bits = tiers[tier_of(lane)]
    decode = decode_record if len(tensors["levels"]) == 17 else decode_record_of_first_edition
    values = decode(tensors["records"][at : at + sum(all_bits)], all_bits, tensors["levels"])
    if transform:
        basis = tensors["basis"]
        values = [sum(c * row[j] for c, row in zip(values, basis, strict=False)) for j in range(H)]
    offset = tensors.get("offset", [0.0] * H)
    return [tensors["scales"][i] * value + shift for value, shift in zip(values[:H], offset, strict=True)]


def decode_record(record: list[int], all_bits: list[int], levels: list[list[int]]) -> list[float]:
    streamed = [{1: 1, 2: 2, 3: 2, 4: 2}.get(bits, 0) for bits in all_bits]
    ring = record[: sum(streamed)]
    stream = [word >> 2 * k & 3 for word in ring for k in range(16)]
    more = iter(record[len(ring) :])
    further = [[next(more) for _ in range({3: 1, 4: 2}.get(bits, 0))] for bits in all_bits]
    planes = [[next(more) for _ in range(bits if bits > 4 else 0)] for bits in all_bits]
    values: list[float] = []
    for group, bits in enumerate(all_bits):
        first = 16 * sum(streamed[:group])
        for i in range(32):
            q, j, m = i // 16, i // 4 % 4, i % 4
            if bits == 0:
                values.append(0.0)
            elif bits > 4:
                code = sum((plane >> i & 1) << p for p, plane in enumerate(planes[group]))
                values.append(code - (2**bits - 1) / 2)
            else:
                t = first + (4 * m + j if bits == 1 else 16 * q + 4 * m + j)
                w = sum(stream[(t + k) % len(stream)] << 2 * k for k in range(6))
                i0, i1, i2 = w >> 4 & 15, (w ^ w >> 8) & 15, (w >> 3 ^ w >> 8) & 15
                first_table = {1: 3 * q, 2: 6, 3: 9, 4: 13}[bits]
                third = first_table + 2
                total = levels[first_table][i0] + levels[first_table + 1][i1]
                if bits == 3:
                    third += further[group][0] >> 8 * j + 4 * q + m & 1
                total += levels[third][i2]
                if bits == 4:
                    total += levels[16][(further[group][q] >> 8 * m + 2 * j & 3) + (i1 & 12)]
                values.append(((total + 128) % 256 - 128) / 32)
    return values


def decode_record_of_first_edition(
    record: list[int], all_bits: list[int], levels: list[list[int]]
) -> list[float]:
    values: list[float] = []
    words = iter(record)
    for bits in all_bits:
        planes = [next(words) for _ in range(bits)]
        codes = [sum((plane >> k & 1) << p for p, plane in enumerate(planes)) for k in range(32)]
        if bits == 0:
            values += [0.0] * 32
        elif bits > 4:
            values += [code - (2**bits - 1) / 2 for code in codes]
        else:
            for k in range(32):
                state = sum(codes[(k - before) % 32] << before * bits for before in range(7)) % 128
                values.append(levels[bits - 1][state] / 4096)
    return values
