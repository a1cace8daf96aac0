"""Text prompts for endpoints that take no soft ones (ours; see each module for what it rebuilds).

    templates.py  a fixed list of templates, compositions with the task's own, class descriptions
    race.py       which of them is best: successive halving on growing batches of images
    mixture.py    a weighted mean of several, learned from answers that are there already
    proposals.py  what to ask a language model for, and how its lines become templates

Everything here is pure: it knows no endpoint, no file and no budget beyond a number.
"""
