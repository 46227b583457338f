"""The training loop as named steps.

loop.py         set up, step, validate, save, finish: the story of a run; it alone knows all the others
strategies.py   which weights learn
step.py         one optimizer step: losses of the micro-batches, guard, clip, update
schedule.py     the learning rate
state.py        all that a run needs to go on, saved and loaded in one place
run_folder.py   the files of a run, and who may write them
progress.py     what is shown while it runs
"""
