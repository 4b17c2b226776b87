"""Questions in English about pictures of 112 x 112: the tasks of the study `smol`.

Its language model is a real one, so questions and answers are people's: words, numbers in digits,
boxes as four numbers. One module a kind of picture; `drawing.py` is what they share.
"""
