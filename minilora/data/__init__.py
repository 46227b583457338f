"""The road from data files to what the model trains on.

    files.py        JSONL, CSV, Parquet, text  -> rows
    records.py      a row                      -> a text, or a conversation
    sources.py      what a configuration names -> files with weights, and the side of a split that a record falls on
    encode.py       a text, a conversation     -> token ids, and which of them are targets
    duplicates.py   texts                      -> which of them are equal, or nearly
    check.py        all of these               -> the data of a run, and what is wrong with them
    pack.py         samples of any length      -> rows of one length, (B, T) batches

Each step can be read, and run, alone. Whatever is wrong with a line is said as "file:line: what is wrong".
"""
