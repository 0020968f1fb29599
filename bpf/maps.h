/* SPDX-License-Identifier: BSD-3-Clause OR GPL-2.0
 *
 * Maps, and what else an object is linked with when it is loaded (pycopy/kernel/objects.py).
 * None is declared the way bcc has it: a map that bcc makes belongs to one text alone, and needs
 * bcc on the host.  The text has numbers (enum pycopy_map) where descriptors go.
 */
#ifndef PYCOPY_MAPS_H
#define PYCOPY_MAPS_H

#include "hook.h"
#include "pycopy.h"

#define PYCOPY_MAP(number)    bpf_pseudo_fd(1, number)
#define PYCOPY_CONSTANT(name) bpf_pseudo_fd(PYCOPY_LINK_CONSTANT, PYCOPY_CONSTANT_##name)

/* bcc rewrites calls of the helpers' own names for maps of its own. */
static void *(*const pycopy_map_lookup)(u64 map, const void *key) = (void *)1;
static long (*const pycopy_map_update)(u64 map, const void *key, const void *value,
				       u64 flags) = (void *)2;
static long (*const pycopy_map_delete)(u64 map, const void *key) = (void *)3;
static long (*const pycopy_perf_output)(void *ctx, u64 map, u64 flags, void *data,
					u64 bytes) = (void *)25;
static long (*const pycopy_map_push)(u64 map, const void *value, u64 flags) = (void *)87;
static long (*const pycopy_map_pop)(u64 map, void *value) = (void *)88;
static long (*const pycopy_map_peek)(u64 map, void *value) = (void *)89;
static long (*const pycopy_ring_output)(u64 ring, void *data, u64 bytes, u64 flags) = (void *)130;

#define pycopy_lookup(map, key)		      pycopy_map_lookup(PYCOPY_MAP(map), key)
#define pycopy_update(map, key, value, flags) pycopy_map_update(PYCOPY_MAP(map), key, value, flags)
#define pycopy_delete(map, key)		      pycopy_map_delete(PYCOPY_MAP(map), key)

#define PYCOPY_NOEXIST 1   /* BPF_NOEXIST */
#define PYCOPY_EXISTS  -17 /* -EEXIST: what an update with it says then */

#define PYCOPY_CURRENT_CPU 0xffffffffULL /* BPF_F_CURRENT_CPU */

/* The user's -F: whether the packet is wanted. */
static long (*const pycopy_filter)(PYCOPY_CTX *ctx, u64 frame_bytes) = (void *)PYCOPY_LINK_FILTER;

static __always_inline struct pycopy_settings *pycopy_settings(void)
{
	u32 zero = 0;

	return pycopy_lookup(PYCOPY_MAP_SETTINGS, &zero);
}

/* Whether user space has not been heard of for that long. */
static __always_inline int pycopy_has_lapsed(u64 now_ns, const u64 patience_ns)
{
	u32 zero = 0;
	u64 *beat_ns = pycopy_lookup(PYCOPY_MAP_HEARTBEAT, &zero);

	return !beat_ns || (now_ns > *beat_ns && now_ns - *beat_ns > patience_ns);
}

/* --- the kernel's sessions --- */

static __always_inline struct pycopy_fast_config *pycopy_config(void)
{
	u32 zero = 0;

	return pycopy_lookup(PYCOPY_MAP_CONFIG, &zero);
}

static __always_inline u64 *pycopy_fast_counts(void)
{
	u32 zero = 0;

	return pycopy_lookup(PYCOPY_MAP_FAST_COUNTS, &zero);
}

/* The time, which the fast path's tests may set. */
static __always_inline u64 pycopy_now(void)
{
#if PYCOPY_FASTPATH
	struct pycopy_fast_config *config = pycopy_config();

	if (config && config->now_ns)
		return config->now_ns;
#endif
	return bpf_ktime_get_ns();
}

/* The session has something pending: the timer looks at it. */
static __always_inline void pycopy_watch(u32 slot)
{
	u32 group = slot / PYCOPY_PENDING_SLOTS;
	struct pycopy_pending *pending = pycopy_lookup(PYCOPY_MAP_PENDING, &group);

	if (pending)
		((u8 *)pending->words)[slot % PYCOPY_PENDING_SLOTS] = 1;
}

#endif
