"""Generates a small corpus of videos with sound and speech, to try everything on.

The media are real: H.264 and AAC files whose pictures are drawn, whose sounds are synthesised and
whose speech is spoken by espeak-ng, so that preparation, decoding and filterbanks work as they do
on other data. Two things are known by construction instead of computed: the transcripts are the
scripts that were spoken (speech recognition would find about the same words), and the teacher's
vectors come from the generator's knowledge of which sights go with which sounds, not from
ImageBind.

plan.py decides what each clip is; scenes.py, sounds.py and speech.py make what is seen, heard and
said; captions.py and topics.py hold all wording; teacher.py makes the teacher's vectors; corpus.py
writes the files.
"""

from data_pipelines.demo_corpus.corpus import generate

__all__ = ["generate"]
