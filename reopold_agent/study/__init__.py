"""Studies that mirror the paper's figures and tables on the embedded tasks.

``python -m reopold_agent.study name=ablation`` trains every setting with every seed and writes
tables and figures; ``--help`` lists the studies. `studies` defines them, `grid` is what they are
made of, `run` trains, `probe` samples several answers per task from trained models, `collect` and
`analyse` turn runs into numbers, `claims`, `tables` and `figures` draw conclusions from them,
`pages` says what each study's report contains, and `report` writes it.
"""
