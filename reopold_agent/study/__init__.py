"""Studies that mirror the paper's figures and tables on the embedded tasks.

``python -m reopold_agent.study name=ablation`` trains every setting with every seed and writes
tables and figures; ``--help`` lists the studies. `studies` defines them, `grid` is what they are
made of, `run` trains, `probe` plays trained models several times per task, `collect` and
`analyse` turn runs into numbers, `figures` and `report` show them.
"""
