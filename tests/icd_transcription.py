"""methods.md section 1 in plain loops: one image, one query, one head at a time, sharing only the weights."""

import math

import torch

CHANNELS, TEACHER, HEADS = 12, 20, 4


def draw(batch, prior, rho, limit):
    """Per image: list of (box normalised, label, anchor, (w, h) in pixels, real)."""
    drawn = []
    for image, count in enumerate(batch.counts):
        total = min(max(1, math.floor(count * (1 + rho))), max(limit, count))
        generator = torch.Generator().manual_seed(batch.seeds[image])
        uniform = torch.rand(total, 5, generator=generator).tolist()
        normal = torch.randn(total, 2, generator=generator).tolist()
        height, width = batch.image_sizes[image].tolist()
        own = [k for k in range(len(batch.boxes)) if batch.image_index[k] == image]
        queries = []
        for n in range(total):
            if n < count:
                box = [side / (width, height)[axis % 2] for axis, side in enumerate(batch.boxes[own[n]].tolist())]
                label = batch.labels[own[n]].item()
            else:
                label, below = 0, prior.frequency[0].item()
                while below <= uniform[n][0]:
                    label += 1
                    below += prior.frequency[label].item()
                centre = [0.03 + uniform[n][1 + axis] * (0.97 - 0.03) for axis in range(2)]
                side = []
                for axis in range(2):
                    mean, std = prior.mean[label, axis].item(), prior.std[label, axis].item()
                    value = min(max(mean + std * normal[n][axis], mean - 2 * std), mean + 2 * std)
                    side.append(min(max(value, 0.002), 0.7))
                box = [
                    centre[0] - side[0] / 2,
                    centre[1] - side[1] / 2,
                    centre[0] + side[0] / 2,
                    centre[1] + side[1] / 2,
                ]
                box = [min(max(edge, 0.0), 1.0) for edge in box]
            size = [box[2] - box[0], box[3] - box[1]]
            anchor = [
                (box[axis] + box[axis + 2]) / 2 + (uniform[n][3 + axis] * 0.6 - 0.3) * size[axis] for axis in (0, 1)
            ]
            queries.append((box, label, anchor, (size[0] * width, size[1] * height), n < count))
        drawn.append(queries)
    return drawn


def descriptor(query, num_classes):
    _, label, anchor, pixels, _ = query
    entries = [float(label == c) for c in range(num_classes)]
    for coordinate in anchor:
        angles = [2 * math.pi * coordinate / 10000 ** (2 * (k // 2) / 128) for k in range(128)]
        entries += [math.sin(angle) for angle in angles[0::2]] + [math.cos(angle) for angle in angles[1::2]]
    for size in pixels:
        scale = math.floor(min(max(math.log(size) * 1.44 - 5, 0), 4)) if size > 0 else 0
        entries += [float(scale == index) for index in range(5)]
    return torch.tensor(entries, dtype=torch.float64)


def dense(linear, vector):
    return linear.weight @ vector + linear.bias


def perceptron(layers, vector):
    for module in layers:
        vector = dense(module, vector) if isinstance(module, torch.nn.Linear) else vector.clamp(min=0)
    return vector


def norm(vector):
    centred = vector - vector.mean()
    return centred / (centred.square().mean() + 1e-5).sqrt()


def position(place, inside):
    angles = [place / inside * 2 * math.pi / 10000 ** (2 * (k // 2) / 128) for k in range(128)]
    return [math.sin(angle) if k % 2 == 0 else math.cos(angle) for k, angle in enumerate(angles)]


def cells_of(batch, image, levels):
    """[(level, y, x, position embedding)] of the cells inside the image."""
    cells = []
    for index, (rows, columns) in enumerate(levels):
        stride = (batch.padded_size[0] / rows + batch.padded_size[1] / columns) / 2
        height, width = batch.image_sizes[image].tolist()
        inside_y, inside_x = min(math.ceil(height / stride), rows), min(math.ceil(width / stride), columns)
        for y in range(inside_y):
            for x in range(inside_x):
                embedding = position(y + 1, inside_y) + position(x + 1, inside_x)
                cells.append((index, y, x, torch.tensor(embedding, dtype=torch.float64)))
    return cells


def decode_image(module, levels, queries, cells, image, temperature):
    """Per layer: decoded queries, probabilities [N][G] over cells at the temperature, values of the cells."""
    decoded = [perceptron(module.encoder.layers, descriptor(q, module.encoder.num_classes)) for q in queries]
    depth, found = CHANNELS // HEADS, []
    for layer in module.decoder:
        features = [levels[index][image, :, y, x] for index, y, x, _ in cells]
        keys = torch.stack(
            [
                dense(layer.key, feature + dense(layer.position, cell[3]))
                for feature, cell in zip(features, cells, strict=True)
            ]
        )
        values = torch.stack([dense(layer.value, feature) for feature in features])
        after, probabilities = [], []
        for query in decoded:
            q, heads, own = dense(layer.query, query), [], []
            for head in range(HEADS):
                part = slice(head * depth, (head + 1) * depth)
                logits = keys[:, part] @ q[part] / math.sqrt(depth)
                weights = logits.exp() / logits.exp().sum()
                heads.append(weights @ values[:, part])
                own.append((logits / temperature).exp() / (logits / temperature).exp().sum())
            hidden = query + dense(layer.output, torch.cat(heads))
            hidden = norm(hidden) * layer.norm_attention.weight + layer.norm_attention.bias
            hidden = hidden + perceptron(layer.feed_forward, hidden)
            after.append(norm(hidden) * layer.norm_feed_forward.weight + layer.norm_feed_forward.bias)
            probabilities.append(own)
        decoded = after
        found.append((decoded, probabilities, values))
    return found


def transcribe(module, prior, student, teacher, batch, detach_student=False):
    """The three losses."""
    drawn = draw(batch, prior, module.rho, module.max_queries)
    valid, real = sum(len(queries) for queries in drawn), sum(batch.counts)
    identification, localisation, distill = 0.0, teacher[0].sum() * 0, 0.0
    levels = [tuple(level.shape[2:]) for level in teacher]
    depth = CHANNELS // HEADS
    for image, queries in enumerate(drawn):
        cells = cells_of(batch, image, levels)
        layers = decode_image(module, teacher, queries, cells, image, module.temperature)
        for number, (decoded, probabilities, values) in enumerate(layers):
            for query, vector in zip(queries, decoded, strict=True):
                box, _, anchor, _, is_real = query
                output = perceptron(module.auxiliary, vector)
                chance = output[0].sigmoid()
                identification = identification - (chance if is_real else 1 - chance).log() / valid
                if is_real:
                    wanted = [anchor[0] - box[0], anchor[1] - box[1], box[2] - anchor[0], box[3] - anchor[1]]
                    for side in range(4):
                        extent = max(wanted[side % 2] + wanted[side % 2 + 2], 1e-7)
                        localisation = localisation + (output[1 + side].sigmoid() - wanted[side]).abs() / extent / real
            for head in range(HEADS):
                part = slice(head * depth, (head + 1) * depth)
                total, mass_sum = 0.0, 0.0
                for s, (index, y, x, _) in enumerate(cells):
                    mass = sum((p[head][s].detach() for p, q in zip(probabilities, queries, strict=True) if q[4]), 0.0)
                    source = student[index][image, :, y, x]
                    mine = dense(module.student_values[number], source.detach() if detach_student else source)
                    error = (norm(mine[part]) - norm(values[s, part].detach())).square()
                    total, mass_sum = total + mass * error.mean(), mass_sum + mass
                distill = distill + total / max(mass_sum, 1e-6) / (len(batch) * HEADS * len(layers))
    return {
        "icd_identification": identification,
        "icd_localisation": localisation,
        "icd_distill": module.weight * distill,
    }
