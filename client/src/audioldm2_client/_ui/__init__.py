"""`audioldm2 ui`: a page to generate with, in a browser.

    command.py   options, and the life of the process
    serving.py   the web application: Gradio and the results' files
    guard.py     what may be asked over HTTP, and by whom
    page.py      the widgets, and what they do; the only module that knows Gradio's components
    session.py   what belongs to one browser tab: its running generation, its history, its files
    form.py      from the widgets' values to a generation's options      (pure)
    snippets.py  from a generation's options to Python and curl          (pure)
    markup.py    progress, errors and results as HTML                    (pure)

Importing the package imports none of it.
"""
