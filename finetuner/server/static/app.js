'use strict';
// Live logs, curves, the map of embeddings, dropped files. Everything else works without scripts.
(function () {
  const api = '/api/v1';
  const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  // the log, state and progress of a run, as they come
  function follow(box) {
    const status = document.getElementById('status');
    const bar = document.getElementById('progress');
    const words = document.getElementById('progress-words');
    const query = `?${box.dataset.query}&after=${box.dataset.after}`;
    const source = new EventSource(`${api}/run/events${query}`);
    source.addEventListener('line', (event) => {
      const atEnd = box.scrollHeight - box.scrollTop - box.clientHeight < 40;
      box.append(`${JSON.parse(event.data)}\n`);
      if (atEnd) box.scrollTop = box.scrollHeight;
    });
    source.addEventListener('state', (event) => {
      const state = JSON.parse(event.data);
      if (status.textContent !== state.status) {
        status.textContent = state.status;
        status.className = `status ${state.status}`;
      }
      showProgress(state.progress || {}, bar, words);
    });
    const curves = setInterval(() => document.querySelectorAll('.curves[data-runs]').forEach(drawCurves), 5000);
    source.addEventListener('end', () => { clearInterval(curves); source.close(); location.reload(); });
    box.scrollTop = box.scrollHeight;
  }

  function showProgress(progress, bar, words) {
    if (!bar || !progress.num_epochs) return;
    const done = (progress.epoch - 1 + (progress.batch || 0) / (progress.num_batches || 1)) / progress.num_epochs;
    bar.value = Math.max(0, Math.min(1, done));
    const left = progress.seconds_left == null ? '' : `, ${Math.round(progress.seconds_left)} s left`;
    const loss = progress.loss == null ? '' : `, loss ${Number(progress.loss).toFixed(4)}`;
    words.textContent = `epoch ${progress.epoch} of ${progress.num_epochs}, batch ${progress.batch} of ${progress.num_batches}${loss}${left}`;
  }

  // curves: one for each name that was measured
  const colours = () => [style('--accent'), style('--good'), style('--bad'), style('--wait')];

  function table(rows) {
    const bySteps = rows.some((row) => row[0] !== null);
    const points = rows.filter((row) => (row[0] !== null) === bySteps);
    return [points.map((row) => (bySteps ? row[0] : row[1] + 1)), points.map((row) => row[2]), bySteps];
  }

  const wholeSteps = [1, 2, 5].flatMap((n) => [0, 1, 2, 3, 4, 5, 6].map((k) => n * 10 ** k)).sort((a, b) => a - b);
  const shortNumber = (value) => (value === 0 ? '0' : String(Number(value.toPrecision(4))));

  function draw(place, name, series) {
    const xs = [...new Set(series.flatMap((each) => each.x))].sort((a, b) => a - b);
    const data = [xs, ...series.map((each) => {
      const values = new Map(each.x.map((x, i) => [x, each.y[i]]));
      return xs.map((x) => (values.has(x) ? values.get(x) : null));
    })];
    const box = document.createElement('div');
    box.className = 'curve';
    const title = document.createElement('h3');
    title.textContent = name;
    box.append(title);
    place.append(box);
    const axis = { stroke: style('--faint'), grid: { stroke: style('--line'), width: 1 }, ticks: { show: false } };
    const few = xs.length < 40;
    new uPlot({
      width: box.clientWidth - 16, height: 190, cursor: { y: false },
      scales: { x: { time: false } },
      axes: [{ ...axis, incrs: wholeSteps }, { ...axis, size: 64, values: (_, ticks) => ticks.map(shortNumber) }],
      legend: { show: series.length > 1 },
      series: [{ label: series[0].bySteps ? 'step' : 'epoch' }, ...series.map((each, i) => ({
        label: each.label, stroke: colours()[i % 4], width: 2, spanGaps: true, points: { show: few },
      }))],
    }, data, box);
  }

  async function drawCurves(place) {
    const runs = JSON.parse(place.dataset.runs);
    const found = await Promise.all(runs.map(async (run) => {
      const answer = await fetch(`${api}/run/curves?${run.query}`);
      return { label: run.label, curves: answer.ok ? await answer.json() : {} };
    }));
    const rank = (name) => (name.includes('loss') ? 0 : name === 'learning_rate' ? 1 : 2);
    const names = [...new Set(found.flatMap((each) => Object.keys(each.curves)))]
      .sort((a, b) => rank(a) - rank(b) || (a < b ? -1 : 1));
    place.style.minHeight = `${place.clientHeight}px`; // what is below stays where it is
    place.replaceChildren();
    for (const name of names) {
      const series = found.filter((each) => each.curves[name]).map((each) => {
        const [x, y, bySteps] = table(each.curves[name]);
        return { label: each.label, x, y, bySteps };
      });
      draw(place, name, series);
    }
    if (!names.length) place.textContent = 'Nothing is measured yet.';
  }

  // the map: where embeddings lie, two of their directions
  function drawMap(place) {
    const points = JSON.parse(document.getElementById('map-points').textContent);
    const canvas = place.querySelector('canvas');
    const hover = place.querySelector('.hover');
    const labels = [...new Set(points.map((p) => p.label))];
    const hue = new Map(labels.map((label, i) => [label, Math.round((i * 137.508) % 360)]));
    const xs = points.map((p) => p.x), ys = points.map((p) => p.y);
    const [left, right, low, high] = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
    let chosen = -1;
    const at = (p) => [
      14 + ((p.x - left) / (right - left || 1)) * (canvas.clientWidth - 28),
      14 + ((p.y - low) / (high - low || 1)) * (canvas.clientHeight - 28),
    ];
    function paint() {
      const scale = window.devicePixelRatio || 1;
      canvas.width = canvas.clientWidth * scale;
      canvas.height = canvas.clientHeight * scale;
      const context = canvas.getContext('2d');
      context.scale(scale, scale);
      points.forEach((p, i) => {
        const [x, y] = at(p);
        const same = chosen >= 0 && points[chosen].label === p.label;
        context.fillStyle = `hsl(${hue.get(p.label)} 65% 50% / ${chosen < 0 || same ? 0.9 : 0.25})`;
        context.beginPath();
        context.arc(x, y, i === chosen ? 7 : same ? 5.5 : 4, 0, 2 * Math.PI);
        context.fill();
      });
    }
    function choose(index) {
      chosen = index;
      hover.hidden = index < 0;
      if (index >= 0) {
        const p = points[index], [x, y] = at(p);
        hover.replaceChildren();
        if (p.thumbnail) {
          const picture = document.createElement('img');
          picture.src = p.thumbnail;
          picture.alt = '';
          hover.append(picture);
        }
        hover.append(p.name);
        const half = x > canvas.clientWidth / 2, lower = y > canvas.clientHeight / 2;
        hover.style.left = half ? '' : `${x + 12}px`;
        hover.style.right = half ? `${canvas.clientWidth - x + 12}px` : '';
        hover.style.top = lower ? '' : `${y + 12}px`;
        hover.style.bottom = lower ? `${canvas.clientHeight - y + 12}px` : '';
      }
      paint();
    }
    canvas.addEventListener('pointermove', (event) => {
      const box = canvas.getBoundingClientRect();
      const [mx, my] = [event.clientX - box.left, event.clientY - box.top];
      let best = -1, distance = 15 * 15;
      points.forEach((p, i) => {
        const [x, y] = at(p), d = (x - mx) ** 2 + (y - my) ** 2;
        if (d < distance) { best = i; distance = d; }
      });
      if (best !== chosen) choose(best);
    });
    canvas.addEventListener('pointerleave', () => choose(-1));
    canvas.addEventListener('keydown', (event) => {
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (!step) return;
      event.preventDefault();
      choose((chosen + step + points.length) % points.length);
    });
    window.addEventListener('resize', paint);
    matchMedia('(prefers-color-scheme: dark)').addEventListener('change', paint);
    paint();
  }

  // a picture that is dropped is as good as one that was chosen
  function takeDrops(form) {
    const place = form.querySelector('.drop');
    const input = form.querySelector('input[type=file]');
    for (const name of ['dragover', 'dragleave', 'drop']) {
      place.addEventListener(name, (event) => {
        event.preventDefault();
        place.classList.toggle('over', name === 'dragover');
        if (name === 'drop' && event.dataTransfer.files.length) {
          input.files = event.dataTransfer.files;
          input.dispatchEvent(new Event('change', { bubbles: true }));
        }
      });
    }
    input.addEventListener('change', () => form.requestSubmit());
  }

  function drawMaps() {
    for (const place of document.querySelectorAll('.map:not([data-drawn])')) {
      place.dataset.drawn = 'yes';
      drawMap(place);
    }
  }

  // a file that is called a picture and is none
  function tellBroken(image) {
    const tell = () => image.replaceWith(`${image.title}: no picture that can be shown`);
    if (image.complete && !image.naturalWidth) tell();
    else image.addEventListener('error', tell);
  }

  document.addEventListener('DOMContentLoaded', () => {
    document.querySelectorAll('.values img').forEach(tellBroken);
    document.querySelectorAll('pre.log[data-query]').forEach(follow);
    document.querySelectorAll('.curves[data-runs]').forEach(drawCurves);
    document.querySelectorAll('form.try').forEach(takeDrops);
    drawMaps();
  });
  // the map comes when it has been computed
  document.addEventListener('htmx:afterSettle', drawMaps);
})();
