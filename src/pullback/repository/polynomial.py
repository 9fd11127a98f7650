# SPDX-License-Identifier: Apache-2.0
"""The chunker polynomial of a repository's config.

pullback cuts at fixed places and has no use for it, but restic reads it from every config, refuses a reducible one
and cuts files by it.  It is a random irreducible polynomial of degree 53 over GF(2), written as hex of its bits.
"""

from __future__ import annotations

import secrets

DEGREE = 53


def random_polynomial() -> int:
    """A random irreducible polynomial of degree 53; one in 53 is, so this takes a few milliseconds."""
    while True:
        # Divisible by x unless the lowest bit is set.
        candidate = 1 << DEGREE | secrets.randbits(DEGREE) | 1
        if is_irreducible(candidate):
            return candidate


def is_irreducible(polynomial: int) -> bool:
    """Rabin's test for a prime degree n: x^(2^n) = x modulo the polynomial, and x^2 - x shares no factor with it."""
    degree = polynomial.bit_length() - 1
    if degree != DEGREE:
        raise ValueError(f"the test is written for degree {DEGREE}, which is prime")
    power = 0b10
    for _ in range(degree):
        power = _square(power, polynomial)
    return power == 0b10 and _gcd(polynomial, 0b110) == 1


def _remainder(value: int, modulus: int) -> int:
    degree = modulus.bit_length()
    while (excess := value.bit_length() - degree) >= 0:
        value ^= modulus << excess
    return value


def _square(value: int, modulus: int) -> int:
    # Squaring over GF(2) spreads the bits: the i-th becomes the 2i-th.
    spread = sum(1 << 2 * bit for bit in range(value.bit_length()) if value >> bit & 1)
    return _remainder(spread, modulus)


def _gcd(first: int, second: int) -> int:
    while second:
        first, second = second, _remainder(first, second)
    return first
