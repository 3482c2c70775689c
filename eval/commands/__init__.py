"""The commands of ``dma-eval``, one module each.

A command module is thin: it reads the command line, calls the module of the harness that does the
work, prints and writes the result. It imports nothing that imports torch, except inside ``run``, so
that ``--help`` answers at once. It defines

    DESCRIPTION, EPILOG     the texts of its ``--help``
    register(commands)      adds it to the command line, with ``options.add_command``
    run(options)            carries it out; raises ``EvalError`` for what cannot be done

What all of them keep to:

* Results are written at the end and in one step (``session.write_results``; ``kernels`` does so after
  every shape, too); eval/schemas has the JSON Schema of every results file, which the tests validate.
* Long work is written down piece by piece and continued after an interruption (``journal``).
* A run of DMA that fails is reported in one line, and the others go on (``failures``).
"""

from __future__ import annotations

from . import calibrate, kernels, layers, models, perplexity, quick, recall, report, speed, tasks, tile_map

MODULES = (quick, perplexity, tasks, recall, layers, calibrate, kernels, speed, models, report, tile_map)
"""The command modules, in the order of ``--help``."""
