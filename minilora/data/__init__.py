"""The road from a JSONL file to what the model trains on.

    records.py   a line of the file       -> a text, or a conversation
    encode.py    a text, a conversation   -> token ids, and which of them are targets
    pack.py      samples of any length    -> rows of one length, (B, T) batches

Each step can be read, and run, alone. Whatever is wrong with a line is said as "file:line: what is wrong".
"""
