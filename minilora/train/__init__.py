"""The training loop as named steps.

loop.py         begin or go on, step, validate, save, finish: the story of a run
setup.py        base, tokenizer, data, what learns: what a run is made of
results.py      what a finished run leaves
dry_run.py      the same in a folder that is thrown away, with one step
compare.py      many runs, ranked on validation
data_check.py   what is wrong with the data, what they come to, what an epoch costs
ledger.py       does the run fit, and what would make it fit
strategies.py   which weights learn
step.py         one optimizer step: losses of the micro-batches, guard, clip, update
graph.py        that step's losses and gradients as one CUDA graph
schedule.py     the learning rate
state.py        all that a run needs to go on, saved and loaded in one place
run_folder.py   the files of a run, and who may write them
looks.py        the test file: opened once, and later looks written down
tensorboard.py  the figures of each step for TensorBoard
signals.py      SIGINT, SIGTERM and SIGHUP, followed between two steps or two weights
progress.py     what is shown while it runs
"""
