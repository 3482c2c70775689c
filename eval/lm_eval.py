"""lm-eval's own command line, with "dma" among the attentions and the bundled tasks among the tasks.

    python -m dma_hf_eval.lm_eval --model hf --tasks hellaswag,dma \
        --model_args pretrained=Qwen/Qwen3-0.6B,attn_implementation=dma

The arguments are those of the command ``lm_eval``, which cannot be used as it is: Transformers knows "dma"
once dma_hf is imported, and nothing imports it there.
"""

from __future__ import annotations

import sys

from lm_eval.__main__ import cli_evaluate

import dma_hf  # noqa: F401  # registers "dma" with Transformers

from .task_files import FOLDER


def main() -> None:
    """Runs lm-eval with the program's arguments; a given ``--include_path`` replaces the bundled tasks."""
    if not any(argument.startswith("--include_path") for argument in sys.argv):
        sys.argv += ["--include_path", str(FOLDER)]
    cli_evaluate()


if __name__ == "__main__":
    main()
