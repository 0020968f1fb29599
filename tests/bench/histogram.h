// SPDX-License-Identifier: BSD-3-Clause
/*
 * The clock, and latencies by the million in 64 KB: counts on a logarithmic scale.
 */
#include <stdint.h>
#include <stdio.h>
#include <time.h>

#define NS    1000000000ULL
#define STEPS 128 /* an octave: no value is off by more than 0.4 % */

struct histogram {
	uint64_t counts[64 * STEPS], total, max_ns;
};

static inline uint64_t now(void)
{
	struct timespec at;

	clock_gettime(CLOCK_MONOTONIC, &at);
	return at.tv_sec * NS + at.tv_nsec;
}

static inline unsigned slot(uint64_t ns)
{
	int octave;

	if (ns < STEPS)
		return ns;
	octave = 63 - __builtin_clzll(ns);
	return ((octave - 6) << 7) + ((ns >> (octave - 7)) & (STEPS - 1));
}

static inline double slot_us(unsigned at)
{
	int octave = (at >> 7) + 6;

	if (at < STEPS)
		return at / 1e3;
	return ((1ULL << octave) + ((at & (STEPS - 1)) + 0.5) * (1ULL << (octave - 7))) / 1e3;
}

static inline void record(struct histogram *in, uint64_t ns)
{
	in->counts[slot(ns)]++;
	in->total++;
	if (ns > in->max_ns)
		in->max_ns = ns;
}

static inline double quantile_us(const struct histogram *of, double share)
{
	uint64_t wanted = share * of->total, seen = 0;
	unsigned at;

	for (at = 0; at < 64 * STEPS; at++) {
		seen += of->counts[at];
		if (seen > wanted)
			return slot_us(at);
	}
	return of->max_ns / 1e3;
}

static inline void print_histogram(const struct histogram *of)
{
	printf("{\"p50\": %.1f, \"p90\": %.1f, \"p99\": %.1f, \"p999\": %.1f, \"max\": %.1f}",
	       quantile_us(of, 0.5), quantile_us(of, 0.9), quantile_us(of, 0.99),
	       quantile_us(of, 0.999), of->max_ns / 1e3);
}
