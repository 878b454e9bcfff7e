"""Training on a model's own judgement: constitutional AI, AI preferences, deliberative alignment.

    constitution.py  a file of principles, each with what is asked for a critique and for a revision
    revise.py        sample, critique, revise: a chat dataset of last revisions
    judge.py         two answers to a prompt, compared by a judge in both orders: a preference dataset
    deliberate.py    reasoning written with a policy's text in the prompt: a chat dataset without the text

Each command writes a dataset for `python -m train`; docs/alignment.md shows the whole way.
"""
