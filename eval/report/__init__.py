"""``dma-eval report``: everything that was measured, as one page that starts with a verdict.

results.py    the results files of a folder, checked against their schemas
settings.py   one setting of DMA across files, by its configuration
verdict.py    whether a setting is safe, by stated limits, and what it buys
caveats.py    what a reader must know before relying on the numbers
plots.py      pictures for the page, as SVG that follows its colours
sections.py   tables and pictures of each kind of results
page.py       the page, as HTML (``page.html``) and Markdown (``page.md``)
"""
