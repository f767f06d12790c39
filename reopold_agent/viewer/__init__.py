"""A local web page over training and evaluation runs: ``python -m reopold_agent.view RUN``.

`lines` follows a file that grows, `summaries` says what the list shows of a row, `run` is one run
folder, `server` serves it on loopback, `export` writes the same page as one file. The page itself
is ``assets``: plain JavaScript, no build step, the same code for both.
"""
