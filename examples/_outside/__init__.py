"""Fakes of what nobody can start on a laptop: payment, push services, SMS."""
