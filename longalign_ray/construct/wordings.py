"""How the task writer puts its questions and answers; braces are filled with the words of a task."""

from __future__ import annotations

# How the document and the question stand in the user's message.
FRAMES = (
    "{text}\n\n{question}",
    "{text}\n\n{question}",
    "{text}\n\nQuestion: {question}",
    "Document:\n\n{text}\n\nQuestion: {question}",
    "Read the following text and answer the question after it.\n\n{text}\n\n{question}",
    "<document>\n{text}\n</document>\n\n{question}",
    "{text}\n\n---\nUsing only the text above, answer this: {question}",
)

QUESTIONS: dict[str, tuple[str, ...]] = {
    "follows": (
        "Which function or class is defined right after `{first}` at the top level?",
        "What is the next top-level definition after {first}?",
        "The text defines {first} at the top level. Which top-level definition comes next?",
    ),
    "precedes": (
        "Which function or class is defined directly before `{second}` at the top level?",
        "Name the top-level definition that comes just before {second}.",
        "Look at {second}. Which top-level definition stands right above it?",
    ),
    "docstring": (
        "What does the first line of the docstring of `{name}` say?",
        "Quote the first line of the docstring of the {kind} {path}.",
        "How does the documentation of the {kind} {path} begin? Give its first line.",
    ),
    "module_of": (
        "The text shows parts of several modules. In which of them is {name} defined?",
        "In which module is the {kind} `{name}` defined?",
        "Under which module heading does the definition of {name} stand?",
    ),
    "class_of": (
        "Which class defines the method `{name}`?",
        "The method {name} belongs to one class in the text. Which one?",
        "In which class is {name} defined?",
    ),
    "parameters": (
        "Which parameters does `{path}` take, in the order of its signature?",
        "List the parameters of the {kind} {path} in order.",
        "What are the names of all parameters in the signature of {path}?",
    ),
    "top_level": (
        "List the top-level {plural} that the text shows of the module {module}, in order of appearance.",
        "Which {plural} are defined at the top level of the module `{module}` in this text? Keep their order.",
        "Go through the module {module} and name its top-level {plural} in the order in which the text has them.",
    ),
    "constant": (
        "Which value is assigned to `{name}` at the top level of the module?",
        "What is the value of the module-level name {name}?",
        "What does the text set {name} to?",
    ),
    "exception": (
        "Which exception does the {kind} `{path}` raise explicitly?",
        "Which exception is named in the raise statements of {path}?",
        "If `{path}` raises an exception itself, which one is it?",
    ),
    "base": (
        "Which class does `{name}` inherit from?",
        "What is the base class of {name}?",
        "Name the class that {name} extends.",
    ),
    "home_of_line": (
        "In which function or method does this line stand?\n{line}",
        "The text contains the line `{line}`. Which function or method is it part of?",
        "Name the function or method with this line in it:\n\n    {line}",
    ),
    "next_line": (
        "Which line comes directly after this one?\n{line}",
        "Find this line in the text and quote the line below it:\n{line}",
        "Continue the text by one line after:\n\n    {line}",
    ),
}

ANSWERS: dict[str, tuple[str, ...]] = {
    "follows": (
        "The definition right after `{first}` is the {kind} `{second}`.",
        "{first} is followed by the {kind} {second}.",
        "The next one is the {kind} `{second}`.",
    ),
    "precedes": (
        "Directly before `{second}` comes the {kind} `{first}`.",
        "The {kind} {first} comes just before {second}.",
        "It is the {kind} `{first}`.",
    ),
    "docstring": (
        "The first line of the docstring of {path} says: {line}",
        "It reads: {line}",
        'The docstring of `{path}` begins with "{line}"',
    ),
    "module_of": (
        "`{name}` is defined in the module {module}.",
        "The {kind} {name} belongs to the module `{module}`.",
        "It is defined in {module}.",
    ),
    "class_of": (
        "The method `{name}` is defined in the class `{owner}`.",
        "{name} belongs to the class {owner}.",
        "The class {owner} defines it.",
    ),
    "parameters": (
        "`{path}` takes the parameters {names}.",
        "In order, they are {names}.",
        "The signature of {path} lists {names}.",
    ),
    "top_level": (
        "In order of appearance: {names}.",
        "The {plural} at the top level of {module} are {names}.",
        "The text defines the {plural} {names}.",
    ),
    "constant": ("`{name}` is set to {value}.", "The value of {name} is {value}.", "It is {value}."),
    "exception": ("`{path}` raises {exception}.", "The {kind} {path} raises `{exception}`.", "It raises {exception}."),
    "base": ("`{name}` inherits from `{base}`.", "The base class of {name} is {base}.", "{name} extends {base}."),
    "home_of_line": (
        "The line is part of the {kind} `{path}`.",
        "It stands in {path}.",
        "That line belongs to the {kind} {path}.",
    ),
    "next_line": ("The line after it is:\n{following}", "It is followed by:\n{following}", "{following}"),
}


def enumerated(names: tuple[str, ...]) -> str:
    """`a, b and c`."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
