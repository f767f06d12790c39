"""The distributed engine: verl's Ray trainer (FSDP) with vLLM servers.

`engine` starts a run; everything else in this package runs inside Ray's processes and imports
verl, which the extra ``verl`` installs.

=============  ======================================================================
`compose`      our configuration as verl's, every key that matters set explicitly
`supported`    what this engine refuses, checked without PyTorch and verl
`engine`       checks, Ray, and the summary at the end
`runner`       the process that drives the run (verl's task runner)
`trainer`      verl's synchronous trainer with our batches, threshold, metrics and evaluation
`rollouts`     processes that play episodes with `RolloutRunner` and ask the vLLM servers
`client`       verl's servers as a `Policy`: ids and pictures in, ids and log-probs out
`records`      trajectories as rows of verl's TransferQueue, and back
`training`     verl's FSDP engine with rows, positions and pictures as everywhere else
`head`         log-probs and entropies of the student's tokens in place of logits
`loss`         objectives as verl's loss function
`checkpoints`  folders of checkpoints, written whole or not at all
`stop`         carries a signal from the command to the trainer
`plugin`       what verl imports in each process: the vLLM server and the CPU platform
=============  ======================================================================
"""
