"""Large numbers as a person reads them."""

_PREFIXES = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"))


def prefix(number: float) -> tuple[float, str]:
    """The unit by which a number is between 1 and 1,000, and its letter; 1 and none below a million."""
    return next(((unit, letter) for unit, letter in _PREFIXES if number >= unit), (1.0, ""))


def flops(number: float) -> str:
    """Floating-point operations, as 316.5 TFLOP."""
    unit, letter = prefix(number)
    return f"{number / unit:,.4g} {letter}FLOP"
