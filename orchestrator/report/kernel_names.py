"""Short names of GPU kernels for sentences: template names run to hundreds of characters."""

import re

KERNEL_NAME_LENGTH = 40
GENERIC_KERNELS = ("Kernel", "Kernel2", "kernel", "device_kernel")
"""Names of C++ templates that are meaningless without their arguments or namespace."""


def short_kernel_name(name: str) -> str:
    """The identifier that distinguishes a kernel, at most 40 characters.

    A demangled C++ name loses its return type, arguments, template arguments and namespaces. If the rest is
    generic, like CUTLASS's `Kernel2`, the first template argument or the namespace is used too.
    """
    whole = name.replace("(anonymous namespace)::", "")
    bare = _without(_without(whole, r"\([^()]*\)"), r"<[^<>]*>")
    # A truncated name keeps an open bracket.
    path = re.split(r"[<(]", bare.removeprefix("void ").split("::type ")[-1])[0].strip()
    *spaces, short = path.split("::")
    argument = re.search(r"<([\w:]+)", whole)
    if short in GENERIC_KERNELS and "cutlass" in spaces and argument:
        short = argument[1].split("::")[-1]
    elif short in GENERIC_KERNELS and spaces:
        short = f"{spaces[-1]}::{short}"
    return short if len(short) <= KERNEL_NAME_LENGTH else short[: KERNEL_NAME_LENGTH - 1] + "…"


def _without(text: str, innermost: str) -> str:
    """Remove matches repeatedly, from the innermost brackets to the outermost."""
    while (shorter := re.sub(innermost, "", text)) != text:
        text = shorter
    return text
