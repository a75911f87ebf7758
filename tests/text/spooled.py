"""Documents -> a spool of them, as preparing makes it."""

from cllm_spheres.text.spool import SpoolReader, SpoolWriter, read_index


def spooled(folder, documents, per_file=3):
    """The index rows without duplicates, and of each document the first that is the same."""
    num_files = -(-len(documents) // per_file)
    for number in range(num_files):
        writer = SpoolWriter(folder, number)
        for text in documents[number * per_file : (number + 1) * per_file]:
            writer.write(text)
            assert writer.end()
        writer.close()
    return read_index(folder, num_files)


def texts_of(folder, part, step=1 << 20):
    """The text of each row of a part, read in ranges of `step` bytes."""
    reader = SpoolReader(folder, part)
    texts = [""] if len(part.rows) else []
    for low in range(0, part.size, step):
        for text, _, starts_document in reader.pieces(low, min(low + step, part.size)):
            if starts_document:
                texts.append("")
            texts[-1] += text
    reader.close()
    return texts
