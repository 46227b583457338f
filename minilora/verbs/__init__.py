"""The verbs of the command line. Thin: each is told what to do, has it done, and prints what comes of it.

training.py    train, data, compare, verify, demo
answering.py   evaluate, generate, chat, serve
weights.py     quantize, merge, export, inspect, explain
terminal.py    what all of them say and hear

Heavy modules are imported inside the verbs, behind their arguments, so that help and usage errors come at once.
"""
