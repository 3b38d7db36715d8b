"""Networks that others wrote, each in every room: does it quantize, how far off, and does everything still hold?

    pip install '.[zoo]'                                   # see docs/zoo.md for torchvision beside a CPU build of torch
    python -m examples.zoo                                 # all cells; what is there is not computed again
    python -m examples.zoo --network bert --room fx pt2e   # some of them
    python -m examples.zoo --page                          # docs/zoo.md from the results that are there

`entry` says what a network is, `networks` lists them, `hosts` knows each host's own int8, `cell` measures one network
in one room, `run` does so in a process of its own, `table` writes the page.
"""
