"""What is said to people."""

_LONGEST_MESSAGE = 600


def one_line(error: BaseException) -> str:
    """An error's message on one line of bearable length."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, MemoryError):
        text = f"out of memory ({text})"
    if len(text) > _LONGEST_MESSAGE:
        text = f"{text[: _LONGEST_MESSAGE - 100]} ... {text[-60:]} (the whole message: --debug)"
    return text


def readable_bytes(count: int) -> str:
    """1_234_567 -> '1.23 MB'; powers of 1000."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            break
        size /= 1000
    return f"{size:.0f} B" if unit == "B" else f"{size:.2f} {unit}"
