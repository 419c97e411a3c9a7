"""`audioldm2 ui`: a page to generate with, in a browser.

    command.py   options; starts and ends the process
    serving.py   the web application: Gradio and the results' files
    guard.py     refuses HTTP requests that aren't from the page
    page.py      the widgets and their events; the only module that knows Gradio's components
    session.py   the state of each browser tab: its running generation, its history, its files
    form.py      from the fields' values to a generation's options       (pure)
    snippets.py  from a generation's options to Python and curl          (pure)
    markup.py    progress, errors and results as HTML                    (pure)

Importing the package imports none of it.
"""
