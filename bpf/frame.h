/* SPDX-License-Identifier: BSD-3-Clause OR GPL-2.0
 *
 * Headers of frames that a program writes itself: what emit.h (to the target) and
 * relay.h (to the online host) have in common.  Knows neither maps nor sessions.
 */
#ifndef PYCOPY_FRAME_H
#define PYCOPY_FRAME_H

#include "parse.h"

#define PYCOPY_HOP_LIMIT 64
#define PYCOPY_IP_UDP	 17
#define PYCOPY_UDP_BYTES 8

static __always_inline u16 pycopy_fold(u64 sum)
{
	sum = (sum & 0xffffffff) + (sum >> 32);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return sum;
}

static __always_inline void pycopy_put16(u8 *at, u16 value)
{
	__builtin_memcpy(at, &value, sizeof(value));
}

static __always_inline void pycopy_put32(u8 *at, u32 value)
{
	__builtin_memcpy(at, &value, sizeof(value));
}

/* Sum of a few bytes, a multiple of 4, in memory order. */
static __always_inline u64 pycopy_sum(void *from, u32 bytes, u32 seed)
{
	return (u32)bpf_csum_diff(0, 0, from, bytes, seed);
}

/* Link and IP header of a frame with `bytes` behind them; addresses of 16 bytes. */
static __always_inline void pycopy_put_ip(u8 *frame, const u8 *l2, const u8 *source,
					  const u8 *destination, const u32 ip_bytes,
					  const u8 protocol, u32 bytes, u16 id)
{
	u8 *ip = frame + PYCOPY_L2_BYTES;

	__builtin_memcpy(frame, l2, PYCOPY_L2_BYTES);
	if (ip_bytes == 20) {
		pycopy_put16(ip, htons(0x4500));
		pycopy_put16(ip + 2, htons(20 + bytes));
		pycopy_put16(ip + 4, id);
		pycopy_put16(ip + 6, htons(0x4000));
		pycopy_put16(ip + 8, htons(PYCOPY_HOP_LIMIT << 8 | protocol));
		pycopy_put16(ip + 10, 0);
		__builtin_memcpy(ip + 12, source + 12, 4);
		__builtin_memcpy(ip + 16, destination + 12, 4);
		pycopy_put16(ip + 10, ~pycopy_fold(pycopy_sum(ip, 20, 0)));
	} else {
		pycopy_put32(ip, htonl(0x60000000));
		pycopy_put16(ip + 4, htons(bytes));
		pycopy_put16(ip + 6, htons(protocol << 8 | PYCOPY_HOP_LIMIT));
		__builtin_memcpy(ip + 8, source, 16);
		__builtin_memcpy(ip + 24, destination, 16);
	}
}

#endif
