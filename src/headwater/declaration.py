"""What all wrong declarations have in common, so that every door can tell them from failures."""


class WrongDeclaration(Exception):
    """The application is declared in a way that can't work, and no second start helps; the message says what to change."""
