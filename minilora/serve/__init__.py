"""A model behind the API that OpenAI's clients speak, and a page to chat in.

request.py   what a client asks for, and all that is wrong with it
line.py      the model in a thread of its own, one answer at a time
server.py    HTTP around the two, until a signal
page.html    the page
"""
