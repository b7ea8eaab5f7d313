/* The ELF note with the kernel's 32-bit entry point for loaders (Xen's PVH, type 18). */

    .section .note.pvh, "a", @note
    .balign 4
    .long 4, 8, 18
    .asciz "Xen"
    .quad pvh_start
