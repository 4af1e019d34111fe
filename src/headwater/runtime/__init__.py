"""Running an application: its handlers, what they publish, and how it starts and stops."""
