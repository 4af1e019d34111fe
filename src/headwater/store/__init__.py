"""The only door to a transactional database, through SQLAlchemy."""
