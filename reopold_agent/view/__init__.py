"""A local web page over training and evaluation runs: ``python -m reopold_agent.view RUN``.

`lines` follows a growing file, `summaries` summarises a row for the list, `run` reads a run folder,
`server` serves it on loopback, `export` writes the same page as one file. The page itself is in
``assets``: plain JavaScript without a build step, the same code for both.
"""
