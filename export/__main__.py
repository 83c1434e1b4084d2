"""`python -m export` and `epd-export`: the command, or one line that names what is not installed."""

from __future__ import annotations

import sys

# The extra's packages; another module that is missing is a defect, and told as one.
_OF_THE_EXTRA = ("torch", "huggingface_hub", "rich", "safetensors", "tokenizers")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: what stands behind the command's name; None takes them from `sys.argv`.

    Returns:
        The exit code.
    """
    try:
        from export.command import run
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _OF_THE_EXTRA:
            raise
        sys.stderr.write(
            f"export failed: it needs the package {error.name}, which is not installed; "
            "pip install 'epd-encoder-sidecar[export]'\n"
        )
        return 1
    return run(arguments)


if __name__ == "__main__":
    sys.exit(main())
